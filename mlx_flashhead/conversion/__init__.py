"""From a model to an index: hidden states, clusters, centroids, probes."""
