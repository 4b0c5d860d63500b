"""The report: numbers with intervals from outcomes (data), figures, one HTML page, and the same table as plain text.

It reads what other stages wrote and measures nothing itself, so nothing here can move a published number but the statistics.
"""
