"""The rank group: messages, launch, supervisor, rank loop, arena."""
