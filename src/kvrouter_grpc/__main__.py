"""`python -m kvrouter_grpc` is `kvrouter`."""

from kvrouter_grpc.cli import main

if __name__ == "__main__":
    main()
