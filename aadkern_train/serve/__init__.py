"""The page in the browser that plays a stream as it is made and steers it, and the server behind it (``aad serve``)."""
