"""What is compressed: language models, their structure, and the text they read."""
