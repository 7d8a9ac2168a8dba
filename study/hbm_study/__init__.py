"""Evidence: every way of choosing α side by side on the same requests, and what a log would gain."""
