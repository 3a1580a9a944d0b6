"""How searches are carried out: plans, their rehearsal, and the schedule over processes."""
