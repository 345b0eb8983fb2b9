"""What tests of several rooms use: processes, servers, a browser, files made for the purpose."""
