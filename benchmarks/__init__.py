"""What `make bench` measures: time, memory and start-up, each beside a floor and, where there is one, a reference."""
