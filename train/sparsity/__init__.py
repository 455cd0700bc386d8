"""N:M activation sparsity of a trained model: calibrated on a text, compared with the dense model, saved and used."""
