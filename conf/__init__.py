"""The config groups, shipped as ``lightning_mmembed.conf``; this file lets an editable install find them."""
