"""How good clips are beside others: metrics, intervals, and a blind comparison by people."""
