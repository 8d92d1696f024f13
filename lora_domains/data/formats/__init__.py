"""File forms: text, tables, JSON, columns (Parquet, Arrow), workbooks; each gives located rows."""
