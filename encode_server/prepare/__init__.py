"""Media bytes to tensors in the arena, in processes that may die: the preparer process, and the front's side of it."""
