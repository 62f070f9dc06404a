"""Layer IO: the inputs and output gradients of every use of a parameter, and the rows' gradients made from them.

``support`` tells by a probe which parameters have layer IO, ``recorder`` watches a forward, ``collect`` runs the
forward and the reverse pass, and ``row_gradients`` multiplies inputs by output gradients.
"""
