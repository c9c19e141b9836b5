"""Terms, objective, distiller, trainer and on-policy rollouts."""
