"""What applications import. Needs grpcio and protobuf, nothing else; may import `proto` only."""
