"""The federated methods: what a client does in a round. This file imports nothing, since `spec` is read where torch must not be."""
