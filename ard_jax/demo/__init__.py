"""The demo: what a run's models draw, side by side, for people who look. Only `page` knows gradio."""
