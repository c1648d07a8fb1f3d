"""Tables: read them, infer their columns, and encode their rows as examples."""
