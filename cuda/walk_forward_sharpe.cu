// walk_forward_sharpe
