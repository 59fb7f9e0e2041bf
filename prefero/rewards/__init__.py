"""Who scores: plain functions, trained reward models, rules, and weighted sums of them."""
