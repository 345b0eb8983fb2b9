"""What one Redis bears and what a worker holds, and what a thousand workers need."""
