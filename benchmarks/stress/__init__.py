"""What a server has to stand: more load than it can serve, clients that misbehave, hostile and random inputs."""
