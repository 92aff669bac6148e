"""What tests share: tiny models, runs in forks, tables of bad input."""
