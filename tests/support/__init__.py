"""The tools of tests in several rooms: processes, servers, a browser, files made for the purpose."""
