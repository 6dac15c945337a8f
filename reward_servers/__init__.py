"""HTTP scorers and the client that calls them.

A scorer is one file in `scorers/`; `app` serves it, `batching` joins the images of many requests into one call,
`serving` starts and drains the process, `telemetry` counts. `client` is all that the rest of Salon may import: it
knows the wire format (contracts) and nothing of the server.
"""
