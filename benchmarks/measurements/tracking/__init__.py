"""How fast, and how safe, journals and tracking are."""
