"""What people look at: numbers in words, tables, model cards, pictures. Decides nothing."""
