"""What a run computes: its program, its state, its optimizer and its evaluation."""
