"""Scoring of images: benchmark rules on detections, outcome tables, and the statistics that compare checkpoints."""
