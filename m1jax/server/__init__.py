"""An OpenAI-compatible server: `service` generates, `protocol` reads and writes messages, `app` is the HTTP of it."""
