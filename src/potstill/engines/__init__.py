"""Text generation and scoring: local decoding, HTTP servers, weight synchronisation."""
