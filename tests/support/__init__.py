"""Parts that tests share: bases, adapters, folders and processes."""
