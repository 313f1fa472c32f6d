"""The algebra of folding, the rules, the plan and its application."""
