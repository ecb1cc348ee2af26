"""What the demo, the benchmarks and the tests share: a server as a child process, and the machine's description."""
