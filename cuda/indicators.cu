// indicators
