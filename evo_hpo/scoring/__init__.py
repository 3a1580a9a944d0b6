"""What an assignment costs: the evaluator of language models, and the problem that it makes."""
