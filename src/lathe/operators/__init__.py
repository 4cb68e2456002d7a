"""Maps between functions, and solvers of the systems behind them."""
