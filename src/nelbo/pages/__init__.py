"""Parts that all HTML pages have in common: style, pictures, files."""
