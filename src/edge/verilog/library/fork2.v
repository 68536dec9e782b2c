// Gives each value of a stream to two layers, each of which may take it when it is ready.
module fork2 (
  input wire clk,
  input wire rst,
  input wire in_valid,
  output wire in_ready,
  output wire a_valid,
  input wire a_ready,
  output wire b_valid,
  input wire b_ready
);
  reg a_done, b_done;
  assign a_valid = in_valid & ~a_done;
  assign b_valid = in_valid & ~b_done;
  assign in_ready = (a_done | a_ready) & (b_done | b_ready);
  always @(posedge clk) begin
    a_done <= ~rst & in_valid & ~in_ready & (a_done | a_ready);
    b_done <= ~rst & in_valid & ~in_ready & (b_done | b_ready);
  end
endmodule
