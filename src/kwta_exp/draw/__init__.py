"""Figures, each with the numbers behind it: ``kwta-exp draw KIND``."""
