"""What operators watch: samples of the last minutes, and the scheduler's steps."""
