"""The invented world in pictures: written digits, drawn glyphs and drawn people, with small classifiers of them."""
