"""The OpenAI-compatible HTTP server; `server/DESIGN.md` tells its parts."""
