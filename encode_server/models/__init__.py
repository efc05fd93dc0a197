"""What a checkpoint needs: its families, encoder-only loading, tensor-parallel plans, attention, preprocessing."""
