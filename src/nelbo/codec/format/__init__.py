"""The file format, and the conversion of data in files to examples and back."""
