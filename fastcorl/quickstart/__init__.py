"""The quickstart: a small real task (scenes of coloured handwritten digits) that trains on two CPU cores."""
