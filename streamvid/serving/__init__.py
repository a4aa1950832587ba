"""A student as a service: live streams over WebSocket, clips over HTTP, and a page to watch them.

``server.create_app`` makes the application, ``command.main`` runs it. Needs the extra ``live``.
"""
