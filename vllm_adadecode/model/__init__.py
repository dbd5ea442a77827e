"""The target as the method sees it: cut into spans, its norm and LM head as the heads read them."""
