"""Layer IO: the inputs and output gradients of every use of a parameter, and the rows' gradients made from them."""
