"""The dashboard: pages made on the server that work without JavaScript and live with it.

From the bottom up:

- `signs`, `figures`: how a state and a number look, the same everywhere;
- one module per page (`overview`, `rollout`, `evidence`, `device`, …): pure functions from rows to
  what is shown;
- `sights`: reads the rows of each page and hands them to those functions;
- `rendering`: templates, security headers, static files; `live`: one stream of changes per page;
- `routes` (looking) and `acts` (wanting something): what the web server calls.

Every name, reason and note comes from people or devices: the template engine escapes it, and the
content security policy allows no script but our own files.
"""
