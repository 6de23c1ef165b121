"""The papers' models and data sets, and what was measured on them."""
