"""Scores of one answer against one reference, 0 … 1 unless said otherwise: text in, numbers out."""
