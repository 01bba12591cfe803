"""Which tokens of which sequences the next step computes, and what becomes of what it gives."""
